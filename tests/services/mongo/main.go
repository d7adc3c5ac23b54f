// Command mongo serves the MongoDB wire protocol from an embedded FerretDB over SQLite files.
// Usage: mongo ADDRESS FOLDER
package main

import (
	"context"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/FerretDB/FerretDB/ferretdb"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: mongo ADDR DIR")
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	db, err := ferretdb.New(&ferretdb.Config{
		Listener:  ferretdb.ListenerConfig{TCP: os.Args[1]},
		Handler:   "sqlite",
		SQLiteURL: "file:" + strings.TrimSuffix(os.Args[2], "/") + "/",
	})
	if err != nil {
		log.Fatal(err)
	}

	if err := db.Run(ctx); err != nil {
		log.Fatal(err)
	}
}
