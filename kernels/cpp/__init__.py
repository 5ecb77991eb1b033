"""C++ templates of Inductor, for few tokens on a CPU."""
