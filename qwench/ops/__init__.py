"""Operations, a file each: a plain-PyTorch reference that supports everything, and faster implementations."""
