"""The document's statements, measured: a module a study, each the work of a stage `study_NAME`."""
