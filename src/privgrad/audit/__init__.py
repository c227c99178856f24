"""Attacks on our own guarantees: what they find is a lower bound on epsilon, which must stay below the claimed one."""
