def violations_of(cfg, environ):
    return []
