"""Read and write files: JSON and YAML with line numbers, atomic writes, redaction, the words of error messages."""
