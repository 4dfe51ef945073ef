"""What BlueKing is asked and how its answers are read: one typed function per endpoint, every failure an `ApiError`."""
