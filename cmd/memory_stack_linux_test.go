package cmd_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// stackMemory is the limit for all processes of snap stack together, for any layers, plus one zstd window.
const stackMemory = 128 << 20

// takenBelow returns the private memory of a process and its descendants, in bytes.
func takenBelow(pid int) (sum int64) {
	visit := []string{strconv.Itoa(pid)}
	for len(visit) > 0 {
		pid := visit[0]
		visit = visit[1:]
		status, _ := os.ReadFile("/proc/" + pid + "/status")
		for line := range strings.Lines(string(status)) {
			if size, ok := strings.CutPrefix(line, "RssAnon:"); ok {
				kb, _ := strconv.ParseInt(strings.Fields(size)[0], 10, 64)
				sum += kb << 10
			}
		}
		tasks, _ := filepath.Glob("/proc/" + pid + "/task/*/children")
		for _, f := range tasks {
			b, _ := os.ReadFile(f)
			visit = append(visit, strings.Fields(string(b))...)
		}
	}
	return sum
}

// stackPeak stacks files, eight at a time, and returns the largest memory that it has seen in use.
func stackPeak(t *testing.T, layers []string) (peak int64) {
	t.Helper()
	c := exec.Command(filepath.Join(bin, "snap"), "--root", filepath.Join(t.TempDir(), "store"), "--snapshotter", "overlayfs", "stack", "--no-sync", "--",
		"sh", "-c", `exec dist-apply --whiteouts "$1" --unresolved "$2" "$3" <"$0" >/dev/null`, "{1}", "{whiteouts}", "{unresolved}", "{dir}")
	c.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	var in, out bytes.Buffer
	for i, file := range layers {
		fmt.Fprintf(&in, "%s\tlayer %d\n", file, i)
	}
	c.Stdin, c.Stdout, c.Stderr = &in, &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	for {
		peak = max(peak, takenBelow(c.Process.Pid))
		select {
		case err := <-ended:
			if n := strings.Count(out.String(), "\n"); err != nil || n != len(layers) {
				t.Fatalf("%v: %s", err, out.String())
			}
			return peak
		case <-time.After(time.Millisecond):
		}
	}
}

// Layers with a large zstd window: one such window is in memory at a time, even if it is not the first frame's.
func TestMemoryOfWindows(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const window, size = 128 << 20, 160 << 20
	var stream bytes.Buffer
	small, err := zstd.NewWriter(&stream, zstd.WithWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	// Of aufs's own files only the name matters: nothing is written.
	header := tar.NewWriter(small)
	if err := header.WriteHeader(&tar.Header{Name: ".wh..wh.aufs", Mode: 0o600, Size: size}); err != nil {
		t.Fatal(err)
	}
	if err := small.Close(); err != nil {
		t.Fatal(err)
	}
	large, err := zstd.NewWriter(&stream, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(large, nothing{}, size+1024); err != nil {
		t.Fatal(err)
	}
	if err := large.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(file, stream.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	peak := stackPeak(t, slices.Repeat([]string{file}, 8))
	t.Logf("layers of %d bytes: %d MiB", stream.Len(), peak>>20)
	if peak < window {
		t.Errorf("%d MiB: the window was not used", peak>>20)
	}
	if peak > window+stackMemory {
		t.Errorf("%d MiB", peak>>20)
	}
}

// Layers of many files with the longest names.
func TestMemoryOfWideLayers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	var stream bytes.Buffer
	compressed, err := zstd.NewWriter(&stream, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(compressed)
	dir := strings.Repeat(strings.Repeat("x", 250)+"/", 15)
	for i := range 6000 {
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprint(dir, i), Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := compressed.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(file, stream.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	peak := stackPeak(t, slices.Repeat([]string{file}, 8))
	t.Logf("%d MiB", peak>>20)
	if peak > stackMemory {
		t.Errorf("%d MiB", peak>>20)
	}
}

type nothing struct{}

func (nothing) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
