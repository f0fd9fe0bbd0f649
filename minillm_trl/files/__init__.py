"""Read and write files: JSON and YAML with line numbers, atomic writes, results that resume, redaction, messages."""
