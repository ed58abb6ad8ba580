// Sweep measures how long dist-gc takes, how much memory it uses, and how long it makes others wait.
//
//	sweep DIR N…
//
// For each N it makes a store of N blobs below DIR. Half of them belong to images with names, ten blobs per image. It
// sweeps the store with the dist-gc on PATH. During the sweep it repeatedly takes the hold, as dist-hold does, and the
// lock of the names, as dist-image does. It prints the number of blobs deleted, the time, the CPU time, the largest
// memory, and the longest and the 99th percentile of the waits.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("sweep: ")
	if len(os.Args) < 3 {
		log.Fatal("usage: sweep DIR N…")
	}
	fmt.Printf("%9s %9s %9s %9s %9s %14s %14s\n", "blobs", "deleted", "seconds", "CPU s", "peak MiB", "hold max/p99", "names max/p99")
	for _, word := range os.Args[2:] {
		n, err := strconv.Atoi(word)
		if err == nil {
			err = measure(filepath.Join(os.Args[1], "sweep-"+word), n)
		}
		if err != nil {
			log.Fatal(err)
		}
	}
}

func measure(dir string, n int) error {
	defer os.RemoveAll(dir)
	if err := fill(dir, n); err != nil {
		return err
	}
	c := exec.Command("dist-gc", "--root", dir, "--grace", "0", "-q")
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := c.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	holds, names := make(chan []time.Duration, 1), make(chan []time.Duration, 1)
	go func() { holds <- probe(done, func() error { return hold(dir) }) }()
	go func() {
		names <- probe(done, func() error { return locked(filepath.Join(dir, "index.json"), unix.LOCK_EX, nil) })
	}()
	deleted := 0
	for lines := bufio.NewScanner(out); lines.Scan(); {
		deleted++
	}
	err = c.Wait()
	took := time.Since(began)
	close(done)
	h, w := <-holds, <-names
	usage := c.ProcessState.SysUsage().(*syscall.Rusage)
	fmt.Printf("%9d %9d %9.2f %9.2f %9.1f %14s %14s\n", n, deleted, took.Seconds(), (c.ProcessState.UserTime() + c.ProcessState.SystemTime()).Seconds(),
		float64(usage.Maxrss)/1024, worst(h), worst(w))
	return err
}

func worst(d []time.Duration) string {
	if len(d) == 0 {
		return "-"
	}
	slices.Sort(d)
	return fmt.Sprintf("%d/%d ms", d[len(d)-1].Milliseconds(), d[len(d)*99/100].Milliseconds())
}

func probe(done chan struct{}, f func() error) (waits []time.Duration) {
	for {
		select {
		case <-done:
			return waits
		case <-time.After(3 * time.Millisecond):
		}
		began := time.Now()
		if err := f(); err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				log.Print(err)
			}
			continue
		}
		waits = append(waits, time.Since(began))
	}
}

// hold takes the hold and releases it: distkit-layout(5), HOLDS.
func hold(dir string) error {
	return locked(filepath.Join(dir, "gate"), unix.LOCK_EX, func() error {
		return locked(filepath.Join(dir, "hold"), unix.LOCK_SH, nil)
	})
}

func locked(name string, how int, f func() error) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.Flock(int(file.Fd()), how); err != nil || f == nil {
		return err
	}
	return f()
}

// fill makes the store. Its blobs are two days old.
func fill(dir string, n int) error {
	err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755)
	err = errors.Join(err, os.MkdirAll(filepath.Join(dir, "ingest"), 0o755))
	err = errors.Join(err, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
	if err != nil {
		return err
	}
	at := []unix.Timespec{unix.NsecToTimespec(time.Now().Add(-48 * time.Hour).UnixNano())}
	at = append(at, at[0])
	blob := func(text string) string {
		sum := sha256.Sum256([]byte(text))
		hex := hex.EncodeToString(sum[:])
		name := filepath.Join(dir, "blobs/sha256", hex)
		if err == nil {
			err = os.WriteFile(name, []byte(text), 0o444)
		}
		if err == nil {
			err = unix.UtimesNanoAt(unix.AT_FDCWD, name, at, 0)
		}
		return fmt.Sprintf(`"digest":"sha256:%s","size":%d`, hex, len(text))
	}
	f, ferr := os.Create(filepath.Join(dir, "index.json"))
	if ferr != nil {
		return errors.Join(err, ferr)
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	fmt.Fprint(w, `{"schemaVersion":2,"manifests":[`)
	const each = 10
	for i := range n / each {
		var layers, diffs []string
		for l := range each - 2 {
			d := blob(fmt.Sprintf("layer %d of image %d", l, i))
			layers = append(layers, `{"mediaType":"application/vnd.oci.image.layer.v1.tar",`+d+`}`)
			diffs = append(diffs, strings.Split(d, `"`)[3])
		}
		config := blob(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + strings.Join(diffs, `","`) + `"]}}`)
		manifest := blob(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json",` +
			config + `},"layers":[` + strings.Join(layers, ",") + `]}`)
		if i%2 == 0 {
			if i > 0 {
				fmt.Fprint(w, ",")
			}
			fmt.Fprintf(w, `{"mediaType":"application/vnd.oci.image.manifest.v1+json",%s,"annotations":{"org.opencontainers.image.ref.name":"registry.example/team/app-%d:latest"}}`, manifest, i)
		}
	}
	_, werr := io.WriteString(w, "]}\n")
	return errors.Join(err, werr, w.Flush())
}
