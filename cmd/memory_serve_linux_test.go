package cmd_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A server that sends 64 large blobs at the same time takes as much memory as for one, and 10,000 idle connections take
// less than 10 KiB each.
const (
	pullsMemory = 64 << 20
	idleMemory  = 96 << 20
)

// startServe runs dist-serve until the test ends.
func startServe(t *testing.T, args ...string) (c *exec.Cmd, addr string) {
	t.Helper()
	c = exec.Command(filepath.Join(bin, "dist-serve"), append([]string{"--listen", "127.0.0.1:0"}, args...)...)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return c, strings.TrimSpace(line)
}

func TestServeSendsWithoutMemory(t *testing.T) {
	const size, pulls = 64 << 20, 64
	root := filepath.Join(t.TempDir(), "store")
	ingest := exec.Command(filepath.Join(bin, "dist-ingest"), "--root", root, "zeros")
	ingest.Stdin = io.LimitReader(zeros{}, size)
	out, err := ingest.Output()
	if err != nil {
		t.Fatal(err)
	}
	digest, _, _ := strings.Cut(string(out), "\t")
	c, addr := startServe(t, "--root", root)
	// Every client takes a part before any takes the rest, so that all blobs are sent at the same time.
	var begun, ended sync.WaitGroup
	begun.Add(pulls)
	for range pulls {
		ended.Go(func() {
			once := sync.OnceFunc(begun.Done)
			defer once()
			resp, err := http.Get("http://" + addr + "/v2/x/blobs/" + digest)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
				t.Error(err)
				return
			}
			once()
			begun.Wait()
			if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != size-1<<20 {
				t.Errorf("%d bytes came, %v", n+1<<20, err)
			}
		})
	}
	ended.Wait()
	checkMemory(t, c, pullsMemory)
}

// zeros is an endless reader.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

func TestServeIdleConnections(t *testing.T) {
	const connections = 10000
	c, addr := startServe(t, "--root", filepath.Join(t.TempDir(), "store"), "--max-connections", fmt.Sprint(connections))
	open := make([]net.Conn, 0, connections)
	defer func() {
		for _, conn := range open {
			conn.Close()
		}
	}()
	answer := make([]byte, 512)
	for i := range connections {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Skipf("connection %d: %v", i, err)
		}
		open = append(open, conn)
		if _, err := io.WriteString(conn, "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(answer); err != nil || !bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 200")) {
			t.Fatalf("connection %d: %q, %v", i, answer[:n], err)
		}
	}
	checkMemory(t, c, idleMemory)
}

// A client that goes on sending after its last request gets its reply, and the status is 0.
func TestServeOnStdioOfAClientThatGoesOn(t *testing.T) {
	t.Parallel()
	c := exec.Command(filepath.Join(bin, "dist-serve"), "--stdio", "--root", t.TempDir())
	c.Stdin = io.MultiReader(strings.NewReader("GET /v2/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"), io.LimitReader(zeros{}, 8<<20))
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if !bytes.HasSuffix(out, []byte("{}")) || c.ProcessState.ExitCode() != 0 {
		t.Errorf("reply %q, %v, %s", out, err, &stderr)
	}
}

// The caller's pipe stays in blocking mode.
func TestServeOnStdioLeavesThePipeAsItIs(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err = io.WriteString(w, "GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(filepath.Join(bin, "dist-serve"), "--stdio", "--root", t.TempDir())
	c.Stdin = r
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	raw, err := r.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
			t.Errorf("flags %#x, %v", flags, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestServeOnNoAddress(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"127.0.0.1", "127.0.0.1:nosuch", "127.0.0.1:65536"} {
		c := exec.Command(filepath.Join(bin, "dist-serve"), "--listen", address, "--root", t.TempDir())
		if out, _ := c.CombinedOutput(); c.ProcessState.ExitCode() != 2 {
			t.Errorf("--listen %s: status %d, %s", address, c.ProcessState.ExitCode(), out)
		}
	}
}
