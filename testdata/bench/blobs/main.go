// Blobs serves one OCI image layout as repository x of a registry. It listens on a loopback address and does as little
// work as possible, so that a measurement is one of the client.
//
//	blobs [-tls FILE] [-rate BYTES] [-link BYTES] [-last FILE] DIR
//
// It prints its address, and ends at the end of its standard input. With -tls it serves HTTPS, with HTTP/2, and writes
// its certificate to FILE. With -rate no connection gets more than that many bytes a second, as with some content
// networks; with -link all connections together don't. With -last the times of FILE are set whenever bytes have been
// sent.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("blobs: ")
	rate := flag.Int("rate", 0, "`BYTES` a second of each connection")
	link := flag.Int("link", 0, "`BYTES` a second of all connections")
	secure := flag.String("tls", "", "speak HTTPS, with a certificate that is written to `FILE`")
	last := flag.String("last", "", "`FILE` whose times tell when the last bytes were sent")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatal("usage: blobs [-rate BYTES] [-link BYTES] [-last FILE] DIR")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: layout(flag.Arg(0)), ErrorLog: log.New(io.Discard, "", 0)}
	if *secure != "" {
		if server.TLSConfig, err = selfSigned(*secure); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(l.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	if *rate > 0 {
		l = limited{Listener: l, pace: func() *pace { return &pace{rate: *rate} }}
	}
	if *link > 0 || *last != "" {
		all := &pace{rate: *link, last: *last}
		l = limited{Listener: l, pace: func() *pace { return all }}
	}
	if *secure != "" {
		log.Fatal(server.ServeTLS(l, "", ""))
	}
	log.Fatal(server.Serve(l))
}

// selfSigned makes a certificate for the loopback addresses, and writes it to a file.
func selfSigned(file string) (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		Subject: pkix.Name{CommonName: "blobs"}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	certificate := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return &tls.Config{Certificates: []tls.Certificate{certificate}}, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
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

// limited limits the rate of connections.
type limited struct {
	net.Listener
	pace func() *pace
}

func (l limited) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &slow{c, l.pace()}, nil
}

// A pace limits the rate of the connections that share a link.
type pace struct {
	rate int
	last string

	mu   sync.Mutex
	free time.Time // when the next byte may be sent
}

// next waits until n bytes may be sent.
func (p *pace) next(n int) {
	if p.rate == 0 {
		return
	}
	p.mu.Lock()
	at := p.free
	if now := time.Now(); at.Before(now) {
		at = now
	}
	p.free = at.Add(time.Duration(n) * time.Second / time.Duration(p.rate))
	p.mu.Unlock()
	time.Sleep(time.Until(at))
}

type slow struct {
	net.Conn
	pace *pace
}

func (c *slow) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		piece := p[done:min(done+max(c.pace.rate/100+1, 64<<10), len(p))]
		c.pace.next(len(piece))
		n, err := c.Conn.Write(piece)
		done += n
		if err != nil {
			return done, err
		}
	}
	if c.pace.last != "" {
		now := time.Now()
		_ = os.Chtimes(c.pace.last, now, now)
	}
	return done, nil
}
