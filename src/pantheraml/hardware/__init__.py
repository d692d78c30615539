"""What the machine is. The only room that may name a device."""
