"""What all examples do alike: flags and messages, files that are never half written, runs that resume, intervals, pictures."""
