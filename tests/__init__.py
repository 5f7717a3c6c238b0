"""The tests. A package, so that none of the same name elsewhere on the path hides it."""
