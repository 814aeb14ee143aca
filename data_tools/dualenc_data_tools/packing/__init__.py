"""Packing: records → checked, filtered, re-encoded samples, on several engines, in an order that none changes."""
