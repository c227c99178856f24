"""Measurements against peers, and against the same step without privacy. From the checkout: python -m benchmarks.NAME"""
