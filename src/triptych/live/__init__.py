"""Needs a live tensor or model: trace and diagnose what code did to fused rows. Torch is imported only when given."""
