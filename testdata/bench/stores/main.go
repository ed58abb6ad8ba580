// Stores makes the stores and files on which the figures of the store are measured.
//
//	stores blobs N DIR       a store of N small blobs
//	stores names N DIR       a store with N names of one manifest, whose digest is printed
//	stores layer N FILE      a plain layer of N empty files, 100 per directory
//	stores hash-copy DST     hashes standard input in Go and writes it to DST, in one pass, and syncs that and its directory
//
// The last one does the least work with which a stream can be verified and stored durably.
package main

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("stores: ")
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "hash-copy":
		err = hashCopy(os.Args[2])
	case len(os.Args) == 4 && (os.Args[1] == "blobs" || os.Args[1] == "names" || os.Args[1] == "layer"):
		var n int
		if n, err = strconv.Atoi(os.Args[2]); err != nil {
			break
		}
		err = map[string]func(int, string) error{"blobs": blobs, "names": names, "layer": layer}[os.Args[1]](n, os.Args[3])
	default:
		log.Fatal("usage: stores blobs|names N DIR, stores layer N FILE, or stores hash-copy DST")
	}
	if err != nil {
		log.Fatal(err)
	}
}

func hashCopy(to string) error {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.CopyBuffer(io.MultiWriter(h, f), struct{ io.Reader }{os.Stdin}, make([]byte, 256<<10)); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close(), dir.Sync(), dir.Close()); err != nil {
		return err
	}
	fmt.Printf("%x\n", h.Sum(nil))
	return nil
}

func layout(dir string) error {
	err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755)
	return errors.Join(err, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
}

func blob(dir, text string) (string, error) {
	sum := sha256.Sum256([]byte(text))
	name := hex.EncodeToString(sum[:])
	return name, os.WriteFile(filepath.Join(dir, "blobs/sha256", name), []byte(text), 0o444)
}

func blobs(n int, dir string) error {
	if err := layout(dir); err != nil {
		return err
	}
	for i := range n {
		if _, err := blob(dir, strconv.Itoa(i)); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "index.json"), []byte(`{"schemaVersion":2,"manifests":[]}`), 0o644)
}

func names(n int, dir string) error {
	if err := layout(dir); err != nil {
		return err
	}
	const manifest = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`
	digest, err := blob(dir, manifest)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "index.json"))
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	fmt.Fprint(w, `{"schemaVersion":2,"manifests":[`)
	for i := range n {
		if i > 0 {
			fmt.Fprint(w, ",")
		}
		fmt.Fprintf(w, `{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s","size":%d,"annotations":{`+
			`"distkit.created":"2026-01-02T03:04:05.123456789Z","distkit.updated":"2026-01-02T03:04:05.123456789Z",`+
			`"org.opencontainers.image.ref.name":"registry.example/team/app-%d:latest"}}`, digest, len(manifest), i)
	}
	fmt.Fprint(w, "]}\n")
	fmt.Println("sha256:" + digest)
	return errors.Join(w.Flush(), f.Close())
}

// layer writes a layer of n empty files.
func layer(n int, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	b := bufio.NewWriterSize(f, 1<<20)
	w := tar.NewWriter(b)
	for i := range n {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/share/d%05d/file%08d.h", i/100, i), Mode: 0o644, ModTime: time.Unix(1700000000+int64(i), 0)}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), b.Flush(), f.Close())
}
