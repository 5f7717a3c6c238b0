"""Where pixels come from: files, archives, arrays and named data sets."""
