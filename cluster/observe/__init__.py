"""What the cluster says of itself: metrics."""
