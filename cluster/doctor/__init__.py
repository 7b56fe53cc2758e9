"""What `diptych doctor` looks at on this machine."""
