"""Client of the BlueKing APIs: one typed function per endpoint. Every failure is an `ApiError`."""
