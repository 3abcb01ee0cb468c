from renamed import tell  # type: ignore[import-not-found]

tell()
