"""Raw files on disk -> scans that can be streamed, or a clear refusal."""
