"""Read and write files so that neither a bad input nor a crash costs a run.

- `json_files`, `yaml_files`: parsing, with the place of a mistake in the error
- `whole_files`: atomic writes; `result_folder`: results that an interrupted run resumes
- `redaction`: secrets removed from what is written; `messages`: words of error messages
"""
