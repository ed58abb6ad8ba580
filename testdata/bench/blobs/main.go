// Blobs serves one OCI image layout as repository x of a registry, over plain HTTP on
// loopback and as cheaply as it can be done, so that what is measured is the client.
//
//	blobs [-rate BYTES] DIR
//
// It prints its address and ends at the end of its standard input. With -rate no connection
// gets more than so many bytes a second, as some content networks do it.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("blobs: ")
	rate := flag.Int("rate", 0, "`BYTES` a second of each connection")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatal("usage: blobs [-rate BYTES] DIR")
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
	if *rate > 0 {
		l = limited{l, *rate}
	}
	log.Fatal(http.Serve(l, layout(flag.Arg(0))))
}

type layout string

func (dir layout) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, id, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/x/"), "/")
	if r.URL.Path == "/v2/" {
		return
	}
	var index struct {
		Manifests []struct{ MediaType, Digest string }
	}
	b, err := os.ReadFile(filepath.Join(string(dir), "index.json"))
	if err != nil || json.Unmarshal(b, &index) != nil || len(index.Manifests) == 0 {
		http.Error(w, "not a layout", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if kind == "manifests" {
		m := index.Manifests[0]
		if !strings.Contains(id, ":") {
			id = m.Digest
		}
		w.Header().Set("Docker-Content-Digest", id)
		w.Header().Set("Content-Type", m.MediaType)
		if id != m.Digest {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		}
	}
	alg, hex, ok := strings.Cut(id, ":")
	f, err := os.Open(filepath.Join(string(dir), "blobs", filepath.Base(alg), filepath.Base(hex)))
	if !ok || err != nil {
		http.NotFound(w, r)
		return
	}
	defer f.Close()
	http.ServeContent(w, r, "", time.Time{}, f)
}

// limited gives each connection a rate.
type limited struct {
	net.Listener
	rate int
}

func (l limited) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &slow{Conn: c, rate: l.rate}, nil
}

type slow struct {
	net.Conn
	rate int
	free time.Time // when the next byte may go
}

func (c *slow) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		piece := p[done:min(done+c.rate/100+1, len(p))]
		time.Sleep(time.Until(c.free))
		if now := time.Now(); c.free.Before(now) {
			c.free = now
		}
		n, err := c.Conn.Write(piece)
		done += n
		c.free = c.free.Add(time.Duration(n) * time.Second / time.Duration(c.rate))
		if err != nil {
			return done, err
		}
	}
	return done, nil
}
