"""What each kernel means, in plain torch: correct on every device, fast on none."""
