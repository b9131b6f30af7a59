from cluster.dev.commands import main

main()
