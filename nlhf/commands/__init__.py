"""The commands of ``nlhf``, a module each: ``add(commands)`` declares, ``run(arguments)`` does."""
