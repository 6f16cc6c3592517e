"""Other servers with the same model: what they are told, as their own documents say."""
