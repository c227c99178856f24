"""Reports for people: the certificate as a page."""
