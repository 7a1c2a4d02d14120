"""`danlu plan` and `danlu rates`: what a recipe would need and take on a cluster, before it runs."""
