"""How views get to the device: from memory, with torch workers, or with DALI."""
