"""The contracts: for each op its schema, fake, checks, autograd and public function."""
