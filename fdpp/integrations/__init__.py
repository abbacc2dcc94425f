"""fdpp inside other projects: each module needs the project it is named after."""
