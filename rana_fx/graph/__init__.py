"""Reading a traced graph: operations, dataflow, normalisation, linears and their roles. Knows neither plans nor rewrites."""
