"""The stages of a step, one file each, in the order data passes them: sampling, clipping, noise; and plan and step."""
