"""The promise: adjacency, protected unit, events, accountants, ledger, certificate. Imports no torch."""
