"""Commands of ``trinityx`` that come in families, a module each: parse, call one function, print."""
