// Benchapply applies the same layers with distkit and with its peers, in one run, and prints
// how long each took: the best of several rounds, and its ratio to ours.
//
//	go run . [-dir DIR] [-rounds N] [-files N] [LAYER.tar.gz…]
//
// Without layers it makes one of small files and one of large ones. DIR should be on tmpfs.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	moby "github.com/moby/go-archive"

	ours "distkit/archive"
)

var (
	dir    = flag.String("dir", "/dev/shm", "where layers are made and applied")
	rounds = flag.Int("rounds", 3, "rounds of each")
	files  = flag.Int("files", 80000, "files of the layer of small files")
	slow   = flag.Bool("slow", false, "with moby/go-archive too")
)

type peer struct {
	name  string
	apply func(root, layer string) error
}

func main() {
	log.SetFlags(0)
	flag.Parse()
	tmp, err := os.MkdirTemp(*dir, "benchapply-")
	check(err)
	defer os.RemoveAll(tmp)
	layers := flag.Args()
	if len(layers) == 0 {
		layers = []string{filepath.Join(tmp, "small"), filepath.Join(tmp, "large")}
		check(makeLayer(layers[0], *files, 6000))
		check(makeLayer(layers[1], 60, 8<<20))
	}
	peers := []peer{
		{"distkit", func(root, layer string) error {
			return from(layer, func(r io.Reader) error {
				_, err := ours.Apply(context.Background(), root, r, ours.Options{})
				return err
			})
		}},
		{"containerd", func(root, layer string) error {
			return from(layer, func(r io.Reader) error {
				z, err := compression.DecompressStream(r)
				if err != nil {
					return err
				}
				defer z.Close()
				_, err = archive.Apply(context.Background(), root, z)
				return err
			})
		}},
		{"gzip | tar", pipe("gzip")},
		{"igzip | tar", pipe("igzip")},
	}
	if *slow {
		peers = append(peers, peer{"go-archive", func(root, layer string) error {
			return from(layer, func(r io.Reader) error {
				_, err := moby.ApplyLayer(root, r)
				return err
			})
		}})
	}
	fmt.Printf("%d processors, %s, %s; containerd with %s\n", runtime.NumCPU(), runtime.Version(), *dir, decompressor())
	for _, layer := range layers {
		best := map[string]time.Duration{}
		cpu := map[string]time.Duration{}
		for range *rounds {
			for _, p := range peers {
				root := filepath.Join(tmp, "root")
				check(os.Mkdir(root, 0o755))
				before, start := used(), time.Now()
				check(p.apply(root, layer))
				took, burnt := time.Since(start), used()-before
				if best[p.name] == 0 || took < best[p.name] {
					best[p.name] = took
				}
				if cpu[p.name] == 0 || burnt < cpu[p.name] {
					cpu[p.name] = burnt
				}
				check(os.RemoveAll(root))
			}
		}
		info, err := os.Stat(layer)
		check(err)
		fmt.Printf("%s, %d MB compressed\n", filepath.Base(layer), info.Size()/1e6)
		for _, p := range peers {
			fmt.Printf("  %-12s %7.2f s %6.2fx   processor %7.2f s %6.2fx\n", p.name,
				best[p.name].Seconds(), best[p.name].Seconds()/best["distkit"].Seconds(),
				cpu[p.name].Seconds(), cpu[p.name].Seconds()/cpu["distkit"].Seconds())
		}
	}
}

func decompressor() string {
	for _, name := range []string{"igzip", "unpigz"} {
		if _, err := exec.LookPath(name); err == nil && os.Getenv("CONTAINERD_DISABLE_"+map[string]string{"igzip": "IGZIP", "unpigz": "PIGZ"}[name]) == "" {
			return name
		}
	}
	return "its own gzip"
}

// used is the processor time of this process and of its children.
func used() time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var ru syscall.Rusage
		check(syscall.Getrusage(who, &ru))
		sum += time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	return sum
}

func from(layer string, f func(io.Reader) error) error {
	r, err := os.Open(layer)
	if err != nil {
		return err
	}
	defer r.Close()
	return f(r)
}

func pipe(decompress string) func(root, layer string) error {
	return func(root, layer string) error {
		c := exec.Command("sh", "-c", `"$0" -dc < "$1" | tar -xpf - --numeric-owner -C "$2"`, decompress, layer, root)
		c.Stderr = os.Stderr
		return c.Run()
	}
}

// makeLayer makes a layer of files of about size bytes, as compressible as source and programs.
func makeLayer(path string, files, size int) error {
	rnd := rand.New(rand.NewPCG(1, 2))
	var words [][]byte
	for range 4000 {
		w := make([]byte, 2+rnd.IntN(10))
		for i := range w {
			w[i] = byte('a' + rnd.IntN(26))
		}
		words = append(words, append(w, " \n(){};.,"[rnd.IntN(9)]))
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	z := gzip.NewWriter(f)
	w := tar.NewWriter(z)
	var body bytes.Buffer
	for i := range files {
		d := fmt.Sprintf("lib/node_modules/p%d", i/80)
		if i%10 == 0 {
			d += fmt.Sprintf("/s%d", i/10)
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}); err != nil {
				return err
			}
		} else {
			d += fmt.Sprintf("/s%d", i/10)
		}
		body.Reset()
		for n := rnd.IntN(2*size) + 1; body.Len() < n; {
			// Squaring prefers the first words, as language does.
			x := rnd.Float64()
			body.Write(words[int(x*x*float64(len(words)))])
			if rnd.IntN(12) == 0 && body.Len() > 200 {
				from := rnd.IntN(body.Len() - 100)
				body.Write(bytes.Clone(body.Bytes()[from : from+20+rnd.IntN(80)]))
			}
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/file%d.js", d, i), Mode: 0o644, Size: int64(body.Len()), ModTime: time.Unix(1486094706, 0)}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(body.Bytes()); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return z.Close()
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
