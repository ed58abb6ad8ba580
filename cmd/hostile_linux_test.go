package cmd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	indexType    = "application/vnd.oci.image.index.v1+json"
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	layerType    = "application/vnd.oci.image.layer.v1.tar"
)

// hostile is a registry with a different attack in each repository.
type hostile struct {
	*httptest.Server
	mu      sync.Mutex
	content map[string]map[string][]byte // by repository, then by tag or digest
	types   map[string]string            // by digest
	asked   int
}

func newHostile(t *testing.T) *hostile {
	h := &hostile{content: map[string]map[string][]byte{}, types: map[string]string{}}
	h.Server = httptest.NewServer(h)
	t.Cleanup(func() {
		h.CloseClientConnections()
		h.Close()
	})
	return h
}

func (h *hostile) host() string { return h.Listener.Addr().String() }

// add adds content to a repository and returns its descriptor as JSON.
func (h *hostile) add(repository, tag, mediaType string, content []byte) string {
	d := digest.FromBytes(content).String()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.content[repository] == nil {
		h.content[repository] = map[string][]byte{}
	}
	h.content[repository][d] = content
	h.types[d] = mediaType
	if tag != "" {
		h.content[repository][tag] = content
	}
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, d, len(content))
}

func (h *hostile) index(repository, tag string, entries ...string) string {
	return h.add(repository, tag, indexType, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, indexType, strings.Join(entries, ",")))
}

func (h *hostile) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	h.asked++
	n := h.asked
	h.mu.Unlock()
	repository, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/")
	kind, id, _ := strings.Cut(rest, "/")
	forever := func(piece string) {
		b := []byte(strings.Repeat(piece, 1+(64<<10)/len(piece)))
		for r.Context().Err() == nil {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	}
	switch repository {
	case "endless":
		switch kind {
		case "manifests", "referrers":
			w.Header().Set("Content-Type", indexType)
			if r.Method != http.MethodHead {
				w.Write([]byte(`{"schemaVersion":2,"manifests":[`))
				forever(`{"mediaType":"a/b","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":1},`)
			}
		case "tags":
			w.Write([]byte(`{"tags":["a"`))
			forever(`,"b"`)
		case "blobs":
			w.Header().Set("Content-Type", "application/octet-stream")
			forever("\x00")
		}
		return
	case "endless-error":
		w.WriteHeader(http.StatusForbidden)
		if r.Method != http.MethodHead { // after a HEAD, nobody reads a body, and the next request would get no answer
			forever("\x1b[31mno\x1b[0m\n")
		}
		return
	case "token", "endless-token":
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/v2/realm/%s",service="x"`, h.URL, repository))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
	case "realm":
		if kind == "endless-token" {
			w.Write([]byte(`{"token":"`))
			forever("a")
		}
		w.Write([]byte(`{"token":"` + strings.Repeat("a", 512<<10) + `"}`))
		return
	case "headers":
		for i := range 200000 {
			w.Header().Set(fmt.Sprintf("X-%d", i), "header")
		}
	case "pages":
		w.Header().Set("Link", fmt.Sprintf(`<%s?page=%d>; rel="next"`, r.URL.Path, n))
		if kind == "tags" {
			fmt.Fprintf(w, `{"tags":["tag-%d"]}`, n)
		} else {
			w.Header().Set("Content-Type", indexType)
			fmt.Fprintf(w, `{"schemaVersion":2,"manifests":[{"mediaType":"a/b","digest":"%s","size":1}]}`, digest.FromString(strconv.Itoa(n)))
		}
		return
	case "loop":
		w.Header().Set("Location", fmt.Sprintf("/v2/loop/%s/%s?%d", kind, id, n))
		w.WriteHeader(http.StatusTemporaryRedirect)
		return
	case "loop-two":
		http.Redirect(w, r, "/v2/loop-two-back/"+rest, http.StatusFound)
		return
	case "loop-two-back":
		http.Redirect(w, r, "/v2/loop-two/"+rest, http.StatusFound)
		return
	case "ansi":
		text := "\x1b]0;owned\x07\x1b[2J\x1b[31mred\u202e\x00\r\n\x9b31m"
		body, _ := json.Marshal(map[string]any{"errors": []any{map[string]string{"code": text, "message": text}}})
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		w.Write(body)
		return
	case "ansi-text":
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, "\x1b[31mred\x1b[0m\r\nsecond line\n\u2028third")
		return
	case "ansi-status":
		c, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			fmt.Fprint(c, "HTTP/1.1 499 \x1b[31mred\r\nContent-Length: 0\r\n\r\n")
			c.Close()
		}
		return
	case "ansi-link":
		w.Header().Set("Link", "<\x1b[31m%zz>; rel=\"next\"")
		fmt.Fprint(w, `{"tags":["a"]}`)
		return
	case "ansi-location":
		w.Header().Set("Location", "gopher://\x1b[31mred/")
		w.WriteHeader(http.StatusFound)
		return
	case "ansi-realm":
		w.Header().Set("Www-Authenticate", "Bearer realm=\"http://\x1b[31mred/\"")
		w.WriteHeader(http.StatusUnauthorized)
		return
	case "not-http":
		if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
			fmt.Fprint(c, "220 \x1b[31mmail\r\nHELO\r\n")
			c.Close()
		}
		return
	}
	h.mu.Lock()
	b, ok := h.content[repository][id]
	h.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if repository == "lie" && kind == "blobs" && len(b) > 1000 {
		b = bytes.Repeat([]byte("x"), len(b))
	}
	w.Header().Set("Content-Type", h.types[digest.FromBytes(b).String()])
	if kind == "manifests" {
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(b).String())
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.Write(b)
}

// memory is the limit for every command, whatever a registry sends. It allows a manifest of 8 MiB in memory, with its
// decoded form.
const memory = 96 << 20

// TestHostileRegistry checks that, whatever a registry sends, each command ends within bounded memory, gives the reason
// in one printable line, and stores nothing.
func TestHostileRegistry(t *testing.T) {
	h := newHostile(t)
	// two thousand nested indexes
	deep := h.index("deep", "")
	for range 2000 {
		deep = h.index("deep", "latest", deep)
	}
	// an index of 20,000 entries, within the limits for a document's members and a manifest's size, and one of 100,000,
	// beyond them
	entries := func(n int) []string {
		var list []string
		for i := range n {
			list = append(list, fmt.Sprintf(`{"mediaType":%q,"digest":"%s","size":1,"platform":{"os":"o\u001b[31m%d","architecture":"a"}}`, "a/b", digest.FromString(strconv.Itoa(i)), i))
		}
		return list
	}
	h.index("wide", "latest", entries(20000)...)
	h.index("wider", "latest", entries(100000)...)
	// as many entries without a platform, each of which would have to be fetched
	var unnamed []string
	for i := range 20000 {
		unnamed = append(unnamed, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":1}`, manifestType, digest.FromString(strconv.Itoa(i))))
	}
	h.index("unnamed", "latest", unnamed...)
	// deeply nested JSON, and JSON with large values
	h.add("nested-json", "latest", indexType, []byte(strings.Repeat(`{"manifests":[`, 500000)))
	h.add("many-members", "latest", indexType, fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[{}%s]}`, strings.Repeat(",{}", 2700000)))
	h.add("annotations", "latest", indexType, fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[],"annotations":{"":""%s}}`, strings.Repeat(`,"a":"b"`, 1000000)))
	// An image whose layer is endless, or does not match its descriptor.
	config := h.add("lie", "", "application/vnd.oci.image.config.v1+json", []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`))
	layer := h.add("lie", "", layerType, bytes.Repeat([]byte("layer"), 100000))
	image := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, manifestType, config, layer)
	h.add("lie", "latest", manifestType, image)
	layerDigest := regexp.MustCompile(`sha256:[0-9a-f]{64}`).FindString(layer)
	h.add("huge", "latest", manifestType, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":9223372036854775807},"layers":[]}`, manifestType, digest.FromString("{}")))
	h.add("huge", "", layerType, []byte("{}"))
	h.add("negative", "latest", manifestType, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":-1},"layers":[]}`, manifestType, layerDigest))
	h.add("paths", "latest", manifestType, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:../../../../etc/passwd","size":1},"layers":[]}`, manifestType))
	h.add("shell", "latest", manifestType, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"$(touch owned)","digest":"; touch owned","size":1},"layers":[]}`, manifestType))
	h.index("headers", "latest")

	const zero = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	for _, tt := range []struct {
		repository string
		command    string // with its arguments after LOCATOR
		status     int
	}{
		{"endless", "dist-fetch latest", 4},
		{"endless", "dist-fetch " + zero + " mediatype:" + indexType, 4},
		{"endless", "dist-fetch " + zero + " size:1000000", 4},
		{"endless", "dist-fetch " + zero + " size:1000000 offset:999999", 4},
		{"endless", "dist-fetch --parts=4 " + zero + " size:20000000", 4},
		{"endless", "dist-resolve latest", 4},
		{"endless", "dist-resolve --platform=linux/amd64 latest", 4},
		{"endless", "dist-pull", 4},
		{"endless", "dist-tags", 4},
		{"endless", "dist-referrers " + zero, 4},
		{"endless-error", "dist-fetch latest", 9},
		{"endless-error", "dist-tags", 9},
		{"endless-error", "dist-put latest mediatype:" + manifestType, 9},
		{"endless-error", "dist-untag latest", 9},
		{"endless-token", "dist-fetch latest", 9},
		{"endless-token", "dist-resolve latest", 9},
		{"endless-token", "dist-pull", 9},
		{"token", "dist-resolve latest", 9},
		{"headers", "dist-fetch latest", 6},
		{"pages", "dist-tags", 4},
		{"pages", "dist-referrers " + zero, 4},
		{"loop", "dist-fetch latest", 1},
		{"loop", "dist-fetch " + zero, 1},
		{"loop", "dist-resolve latest", 1},
		{"loop", "dist-pull", 1},
		{"loop", "dist-put " + zero, 1},
		{"loop", "dist-untag latest", 1},
		{"loop-two", "dist-fetch latest", 1},
		{"loop-two", "dist-tags", 1},
		{"lie", "dist-fetch " + layerDigest, 4},
		{"lie", "dist-pull", 4},
		{"deep", "dist-resolve --platform=linux/amd64 latest", 4},
		{"deep", "dist-pull", 4},
		{"deep", "dist-pull --all-platforms", 4},
		{"wide", "dist-resolve --platform=linux/amd64 latest", 3},
		{"wide", "dist-pull", 3},
		{"wide", "dist-pull --all-platforms", 3},
		{"wider", "dist-fetch latest", 4},
		{"wider", "dist-resolve --platform=linux/amd64 latest", 4},
		{"wider", "dist-pull", 4},
		{"unnamed", "dist-resolve --platform=linux/amd64 latest", 3},
		{"unnamed", "dist-pull", 3},
		{"nested-json", "dist-resolve --platform=linux/amd64 latest", 4},
		{"nested-json", "dist-pull", 4},
		{"many-members", "dist-resolve --platform=linux/amd64 latest", 4},
		{"many-members", "dist-pull", 4},
		{"annotations", "dist-pull", 4},
		{"huge", "dist-pull", 4},
		{"negative", "dist-pull", 4},
		{"paths", "dist-pull", 4},
		{"shell", "dist-pull", 4},
		{"ansi", "dist-fetch latest", 9},
		{"ansi", "dist-fetch " + zero, 9},
		{"ansi", "dist-put " + zero, 9},
		{"ansi", "dist-tags", 9},
		{"ansi-text", "dist-tags", 1},
		{"ansi-text", "dist-fetch latest", 1},
		{"ansi-status", "dist-fetch latest", 1},
		{"ansi-link", "dist-tags", 6},
		{"ansi-location", "dist-fetch latest", 6},
		{"ansi-realm", "dist-fetch latest", 6},
		{"not-http", "dist-fetch latest", 6},
	} {
		t.Run(strings.ReplaceAll(tt.repository+" "+strings.NewReplacer(zero, "digest", layerDigest, "digest", "/", "_").Replace(tt.command), " ", "_"), func(t *testing.T) {
			t.Parallel()
			words := strings.Fields(tt.command)
			name, flags := words[0], 1
			for flags < len(words) && strings.HasPrefix(words[flags], "--") {
				flags++
			}
			args := append(slices.Clone(words[1:flags]), h.host()+"/"+tt.repository)
			args = append(args, words[flags:]...)
			dir := t.TempDir()
			store := filepath.Join(dir, "store")
			c := command(dir, store, name, args...)
			c.Stdin = strings.NewReader("{}")
			var out counter
			var errs bytes.Buffer
			c.Stdout, c.Stderr = &out, &errs
			peak := bounded(t, c, 2*time.Minute)
			t.Logf("status %d, %d MiB at most, %d bytes of output: %s", c.ProcessState.ExitCode(), peak>>20, out, &errs)
			if status := c.ProcessState.ExitCode(); status != tt.status {
				t.Errorf("status %d, not %d", status, tt.status)
			}
			if peak > memory {
				t.Errorf("it took %d MiB", peak>>20)
			}
			lines := strings.SplitAfter(strings.TrimSuffix(errs.String(), "\n"), "\n")
			if name != "dist-pull" || len(lines) > 8 {
				oneLine(t, name, errs.String())
			} else {
				// each of several concurrent transfers may report its failure
				for _, line := range lines {
					by, _, _ := strings.Cut(line, ": ")
					oneLine(t, by, strings.TrimSuffix(line, "\n")+"\n")
				}
			}
			if s := errs.String(); len(s) > 1200 || strings.IndexFunc(s, func(r rune) bool {
				return r < ' ' && r != '\n' || r >= 0x7f && r < 0xa0 || r == '\u202e' || r == '\u2028'
			}) >= 0 {
				t.Errorf("it can't be shown: %q", s)
			}
			// Invalid data is not kept. Another transfer that the pull has cancelled may be, to be resumed.
			if files, _ := filepath.Glob(filepath.Join(store, "ingest/*")); len(files) > 0 && !(tt.repository == "lie" && calledOff(files, layerDigest)) {
				t.Errorf("ingests are left: %q", files)
			}
			if names, _, _ := execute(t, dir, store, "", "dist-image", "ls"); names != "" {
				t.Errorf("it has a name: %s", names)
			}
			if _, err := os.Stat(filepath.Join(dir, "owned")); err == nil {
				t.Error("the registry's text was run")
			}
		})
	}
}

// TestFetchMemory checks that a large blob is fetched with less than 24 MiB, in one stream or in parts. Very many
// connections take more.
func TestFetchMemory(t *testing.T) {
	const size = 256 << 20
	piece := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	hash := digest.Canonical.Digester()
	for range size / len(piece) {
		hash.Hash().Write(piece)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, io.NewSectionReader(repeated(piece), 0, size))
	}))
	t.Cleanup(server.Close)
	dir := t.TempDir()
	for parts, limit := range map[string]int64{"1": 24 << 20, "8": 24 << 20, "64": 40 << 20} {
		c := command(dir, dir, "dist-fetch", "--parts", parts, server.Listener.Addr().String()+"/x", hash.Digest().String())
		var out counter
		var errs bytes.Buffer
		c.Stdout, c.Stderr = &out, &errs
		peak := bounded(t, c, 2*time.Minute)
		t.Logf("in %s: %.1f MiB", parts, float64(peak)/(1<<20))
		if out != size || c.ProcessState.ExitCode() != 0 || peak == 0 {
			t.Errorf("in %s: %d bytes, status %d: %s", parts, out, c.ProcessState.ExitCode(), &errs)
		}
		if peak >= limit {
			t.Errorf("in %s: it took %d bytes of memory", parts, peak)
		}
	}
}

// repeated is an endless repetition of a piece.
type repeated []byte

func (r repeated) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		n += copy(p[n:], r[(off+int64(n))%int64(len(r)):])
	}
	return n, nil
}

// counter counts written bytes.
type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

// bounded runs a command, which must end within a time, and returns the largest memory of any of its processes. It
// polls VmHWM, because the kernel's figure for ended processes includes the process that they were forked from.
func bounded(t *testing.T, c *exec.Cmd, within time.Duration) int64 {
	t.Helper()
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	group := c.Process.Pid
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	var peak int64
	for {
		peak = max(peak, highWater(group))
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			return peak
		case <-ctx.Done():
			_ = syscall.Kill(-group, syscall.SIGQUIT) // prints the goroutines
			select {
			case <-ended:
			case <-time.After(10 * time.Second):
				_ = syscall.Kill(-group, syscall.SIGKILL)
				<-ended
			}
			t.Fatalf("%v does not end within %v: %s", c.Args, within, c.Stderr)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// highWater returns the largest VmHWM among the processes of a group.
func highWater(group int) int64 {
	var peak int64
	visit := []string{strconv.Itoa(group)}
	for len(visit) > 0 {
		pid := visit[0]
		visit = visit[1:]
		status, err := os.ReadFile("/proc/" + pid + "/status")
		if err != nil {
			continue
		}
		if _, rest, ok := strings.Cut(string(status), "VmHWM:"); ok {
			var kb int64
			if _, err := fmt.Sscan(rest, &kb); err == nil {
				peak = max(peak, kb<<10)
			}
		}
		tasks, _ := filepath.Glob("/proc/" + pid + "/task/*/children")
		for _, f := range tasks {
			b, _ := os.ReadFile(f)
			visit = append(visit, strings.Fields(string(b))...)
		}
	}
	return peak
}

// calledOff reports whether none of the ingests is of the digest.
func calledOff(ingests []string, dgst string) bool {
	for _, dir := range ingests {
		if b, _ := os.ReadFile(filepath.Join(dir, "expected")); strings.TrimSpace(string(b)) == dgst {
			return false
		}
	}
	return true
}
