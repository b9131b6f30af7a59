"""The history of the tables: one file for each change under `versions/`. `serve_app.jobs.schema` applies them."""
