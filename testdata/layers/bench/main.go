// Bench applies the same layers with distkit and with other tools, in one run. It prints how long each took and how
// much memory it used: the best of several rounds, and its ratio to distkit's.
//
//	bench [-dir DIR] [-rounds N] [-slow=false] LAYER.tar.gz…
//	bench -linear [-dir DIR]
//
// Each application runs in a process of its own. Distkit's is dist-apply from PATH, so its time includes start-up, the
// diff ID and the final check. With -linear, bench makes layers of 62,500, 250,000 and 1,000,000 small files and
// applies them with dist-apply alone.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	moby "github.com/moby/go-archive"

	"layers/peer"
)

var (
	dir    = flag.String("dir", "/dev/shm", "where layers are applied; should be on tmpfs")
	rounds = flag.Int("rounds", 3, "rounds of each, but one of those that take ten times as long")
	slow   = flag.Bool("slow", true, "with moby/go-archive and umoci too")
	linear = flag.Bool("linear", false, "show instead how time and memory of dist-apply grow")
)

// A way is a method of applying a layer: a program, or a library in another process of this program.
type way struct {
	name    string
	command func(root, layer string) *exec.Cmd
	slow    bool
}

func main() {
	log.SetFlags(0)
	if len(os.Args) == 5 && os.Args[1] == "apply" {
		check(apply(os.Args[2], os.Args[3], os.Args[4]))
		return
	}
	flag.Parse()
	tmp, err := os.MkdirTemp(*dir, "bench-apply-")
	check(err)
	defer os.RemoveAll(tmp)
	fmt.Printf("%s, %d processors, %s, %s\n", model(), runtime.NumCPU(), runtime.Version(), *dir)
	if *linear {
		growth(tmp)
		return
	}
	for _, layer := range flag.Args() {
		compare(tmp, layer)
	}
}

// apply applies a layer with a library. It runs in a process of its own.
func apply(name, root, layer string) error {
	f, err := os.Open(layer)
	if err != nil {
		return err
	}
	defer f.Close()
	if name == "go-archive" {
		_, err := moby.ApplyLayer(root, f)
		return err
	}
	z, err := compression.DecompressStream(f)
	if err != nil {
		return err
	}
	defer z.Close()
	_, err = archive.Apply(context.Background(), root, z)
	return err
}

func self(name string, env ...string) func(root, layer string) *exec.Cmd {
	return func(root, layer string) *exec.Cmd {
		c := exec.Command("/proc/self/exe", "apply", name, root, layer)
		c.Env = append(os.Environ(), env...)
		return c
	}
}

func shell(script string) func(root, layer string) *exec.Cmd {
	return func(root, layer string) *exec.Cmd {
		return exec.Command("bash", "-o", "pipefail", "-c", script, root, layer)
	}
}

func compare(tmp, layer string) {
	image := filepath.Join(tmp, "image")
	check(peer.Image(image, layer))
	ours := shell(`dist-apply "$0" < "$1" > /dev/null`)
	peers := []way{
		{"distkit", ours, false},
		{"containerd, in process", self("containerd", "CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1"), false},
		{"igzip -dc | tar -x", shell(`igzip -dc < "$1" | tar -xpf - --numeric-owner -C "$0"`), false},
		{"gzip -dc | tar -x", shell(`gzip -dc < "$1" | tar -xpf - --numeric-owner -C "$0"`), false},
		{"moby/go-archive", self("go-archive", "MOBY_DISABLE_PIGZ=1"), true},
		{"umoci raw unpack", shell(`umoci raw unpack --image '` + image + `:layer' "$0"/rootfs`), true},
	}
	for _, name := range []string{"igzip", "unpigz"} {
		if _, err := exec.LookPath(name); err == nil {
			peers = append(peers[:2], append([]way{{"containerd, " + name, self("containerd"), false}}, peers[2:]...)...)
			break
		}
	}
	best := make([]sample, len(peers))
	for round := range *rounds {
		for i, p := range peers {
			if p.slow && (!*slow || round > 0) {
				continue
			}
			s := measure(tmp, layer, p.command)
			if best[i].wall == 0 || s.wall < best[i].wall {
				best[i] = s
			}
		}
	}
	info, err := os.Stat(layer)
	check(err)
	fmt.Printf("\n%s, %d MB compressed\n", filepath.Base(layer), info.Size()/1e6)
	for i, p := range peers {
		if s := best[i]; s.wall > 0 {
			fmt.Printf("  %-24s %7.2f s %6.2fx   processor %7.2f s %6.2fx   memory %4d MiB\n", p.name,
				s.wall.Seconds(), ratio(s.wall, best[0].wall), s.cpu.Seconds(), ratio(s.cpu, best[0].cpu), s.memory>>20)
		}
	}
	check(os.RemoveAll(image))
}

func ratio(a, b time.Duration) float64 { return a.Seconds() / b.Seconds() }

type sample struct {
	wall, cpu time.Duration
	memory    int64 // of the process that used most
}

func measure(tmp, layer string, command func(root, layer string) *exec.Cmd) sample {
	root := filepath.Join(tmp, "root")
	check(os.Mkdir(root, 0o755))
	c := command(root, layer)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	start := time.Now()
	err := c.Run()
	s := sample{wall: time.Since(start)}
	if err != nil {
		log.Fatalf("%q: %v: %s", c.Args, err, out.Bytes())
	}
	u := c.ProcessState.SysUsage().(*syscall.Rusage)
	s.cpu, s.memory = time.Duration(u.Utime.Nano()+u.Stime.Nano()), u.Maxrss<<10
	check(os.RemoveAll(root))
	return s
}

// growth shows that the time is linear in the number of entries, and that memory does not grow.
func growth(tmp string) {
	layer := filepath.Join(tmp, "layer")
	for _, n := range []int{62_500, 250_000, 1_000_000} {
		check(manyFiles(layer, n))
		s := measure(tmp, layer, shell(`dist-apply "$0" < "$1" > /dev/null`))
		on := measureOnto(tmp, layer)
		fmt.Printf("%9d entries %6.2f s %5.1f µs each, %3d MiB; onto the same tree %6.2f s %5.1f µs each, %3d MiB\n",
			n, s.wall.Seconds(), float64(s.wall.Microseconds())/float64(n), s.memory>>20,
			on.wall.Seconds(), float64(on.wall.Microseconds())/float64(n), on.memory>>20)
	}
}

// measureOnto applies the same layer twice and measures the second time, when every file replaces one.
func measureOnto(tmp, layer string) (s sample) {
	return measure(tmp, layer, func(root, layer string) *exec.Cmd {
		if out, err := shell(`dist-apply "$0" < "$1"`)(root, layer).CombinedOutput(); err != nil {
			log.Fatalf("%v: %s", err, out)
		}
		return shell(`dist-apply "$0" < "$1" > /dev/null`)(root, layer)
	})
}

// manyFiles makes a layer of n entries, files and directories, like those of a package manager.
func manyFiles(path string, n int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return err
	}
	w := tar.NewWriter(z)
	rnd := rand.New(rand.NewPCG(1, 2))
	body := make([]byte, 512)
	for i := range n {
		h := &tar.Header{Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(1486094706, 0)}
		d := fmt.Sprintf("srv/p%d/s%d/", i/1000, i/20)
		h.Name, h.Size = fmt.Sprintf("%sfile%d", d, i), int64(rnd.IntN(len(body)))
		if i%20 == 0 {
			h.Typeflag, h.Name, h.Mode, h.Size = tar.TypeDir, d, 0o755, 0
		}
		for j := range h.Size {
			body[j] = byte(rnd.IntN(64))
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(body[:h.Size]); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return z.Close()
}

func model() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, _ := strings.Cut(line, ":"); strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return runtime.GOARCH
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
