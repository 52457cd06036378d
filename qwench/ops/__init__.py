"""Operations: one file each, a plain-PyTorch reference that supports everything, and faster implementations beside it."""
