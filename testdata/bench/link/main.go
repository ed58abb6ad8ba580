// Link relays TCP connections to an address as if it were far away, so that measurements show how often a client waits
// for a response.
//
//	link [-delay D] [-connect D] ADDRESS
//
// It prints its own address and ends at the end of its standard input. Bytes arrive after -delay, in each direction.
// Nothing is relayed for -connect after a connection was made, which stands for the handshakes of TCP and TLS.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("link: ")
	delay := flag.Duration("delay", 30*time.Millisecond, "of each direction")
	connect := flag.Duration("connect", 120*time.Millisecond, "of a new connection")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatal("usage: link [-delay D] [-connect D] ADDRESS")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(l.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		near, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			time.Sleep(*connect)
			far, err := net.Dial("tcp", flag.Arg(0))
			if err != nil {
				_ = near.Close()
				return
			}
			go relay(far, near, *delay)
			relay(near, far, *delay)
		}()
	}
}

// piece is the result of one read, and when it is to be sent on.
type piece struct {
	due time.Time
	b   []byte
}

// relay copies from one connection to the other and sends each piece after the delay, whatever the number of pieces
// under way. At the end it closes the other connection.
func relay(to, from net.Conn, delay time.Duration) {
	pieces := make(chan piece, 1024)
	go func() {
		defer close(pieces)
		for {
			b := make([]byte, 64<<10)
			n, err := from.Read(b)
			if n > 0 {
				pieces <- piece{time.Now().Add(delay), b[:n]}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.b); err != nil {
			break
		}
	}
	_ = to.Close()
	for range pieces { // so that the reader is not blocked for ever
	}
}
