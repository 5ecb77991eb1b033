"""Reading a traced graph: operations, dataflow, normalisation, linears and their roles. Independent of plans and rewrites."""
