package cmd_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// hostileMemory is the limit for documents by strangers, some of 8 MiB each.
const hostileMemory = 64 << 20

// copyMemory is the limit for dist-copy-graph, for any graph.
const copyMemory = 32 << 20

// hostileSize is a little below the largest size of a document.
const hostileSize = 8<<20 - 1000

// boundedStore returns a function that runs a command on a new store, and fails the test if the command takes too much
// memory.
func boundedStore(t *testing.T) func(stdin string, args ...string) (string, int) {
	t.Helper()
	root := filepath.Join(t.TempDir(), "store")
	return func(stdin string, args ...string) (string, int) {
		t.Helper()
		c := exec.Command(filepath.Join(bin, args[0]), append(args[1:], "--root", root)...)
		c.Stdin = strings.NewReader(stdin)
		var out, stderr bytes.Buffer
		c.Stdout, c.Stderr = &out, &stderr
		peak := bounded(t, c, 2*time.Minute)
		t.Logf("%.60q: status %d, %d MiB %.100s", args, c.ProcessState.ExitCode(), peak>>20, stderr.String())
		if peak > hostileMemory {
			t.Errorf("%.60q took %d MiB", args, peak>>20)
		}
		return out.String(), c.ProcessState.ExitCode()
	}
}

// Documents of 8 MiB that would take a hundred times as much when decoded.
func TestMemoryOfHostileDocuments(t *testing.T) {
	fill := func(begin, piece, end string) string {
		n := (hostileSize - len(begin) - len(end)) / len(piece)
		return begin + strings.Repeat(piece, n-1) + strings.TrimRight(piece, ",") + end
	}
	run := boundedStore(t)
	for i, config := range []string{
		fill(`{"manifests":[`, `{},`, `]}`),
		fill(`{"rootfs":{"type":"layers","diff_ids":[`, `"",`, `]}}`),
		fill(`{"rootfs":{"type":"layers","diff_ids":[`, `"`+digest.FromString("layer").String()+`",`, `]}}`),
		fill(`{"layers":[`, `{"digest":"`+digest.FromString("gone").String()+`"},`, `]}`),
		fill(`{"a":`, `[`, ``) + strings.Repeat("]", 1000),
	} {
		if _, status := run(config, "dist-ingest", fmt.Sprint("config", i)); status != 0 {
			t.Fatal("dist-ingest failed")
		}
		manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[]}`,
			digest.FromString(config), len(config))
		run(manifest, "dist-ingest", fmt.Sprint("manifest", i))
		if _, status := run("", "dist-image", "create", fmt.Sprint("x:", i), digest.FromString(manifest).String()); status != 0 {
			t.Fatal("dist-image create failed")
		}
		run("", "dist-image", "layers", fmt.Sprint("x:", i))
		if out, status := run("", "dist-image", "check", fmt.Sprint("x:", i)); status != 0 {
			t.Errorf("check: %d, %s", status, out)
		}
	}
	if out, status := run("", "dist-gc", "--grace", "0"); status != 0 || out != "" {
		t.Errorf("dist-gc: %d, %s", status, out)
	}
	for name, text := range map[string]string{
		"index.json":    fill(`{"schemaVersion":2,"manifests":[`, `{},`, `]}`),
		"manifest.json": fill(`[`, `{},`, `]`),
	} {
		files := [][2]string{{"oci-layout", `{"imageLayoutVersion":"1.0.0"}`}, {name, text}}
		if name == "manifest.json" {
			files = files[1:]
		}
		if _, status := run(tarOf(t, files...), "dist-import"); status != 2 {
			t.Errorf("import of a hostile %s: status %d", name, status)
		}
	}
}

// tarOf returns an archive of files, given by names and contents.
func tarOf(t *testing.T, files ...[2]string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f[0], Mode: 0o644, Size: int64(len(f[1])), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(f[1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Images that refer to as many different blobs as their documents can hold, or as an image may have.
func TestMemoryOfHostileGraphs(t *testing.T) {
	run := boundedStore(t)
	const (
		manifestType = "application/vnd.oci.image.manifest.v1+json"
		indexType    = "application/vnd.oci.image.index.v1+json"
		most         = 1 << 15 // blobs of an image
	)
	n := 0
	many := func(count int, begin, format, end string) string {
		b := bytes.NewBufferString(begin)
		for i := 0; i < count && b.Len() < hostileSize-len(format)-100-len(end); i++ {
			if i > 0 {
				b.WriteByte(',')
			}
			n++
			fmt.Fprintf(b, format, n)
		}
		return b.String() + end
	}
	descriptor := func(mediaType, rest string) string {
		return `{"mediaType":"` + mediaType + `","digest":"sha256:%064x","size":1` + rest + `}`
	}
	config := `{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + digest.FromString("config").String() + `","size":6}`
	manifest := `{"schemaVersion":2,"mediaType":"` + manifestType + `","config":` + config + `,"layers":[`
	index := `{"schemaVersion":2,"mediaType":"` + indexType + `","manifests":[`
	platform := `,"platform":{"os":"linux","architecture":"amd64","variant":"v1"}`
	ingest := func(text string) string {
		t.Helper()
		if _, status := run(text, "dist-ingest", digest.FromString(text).String()); status != 0 {
			t.Fatal("dist-ingest failed")
		}
		return digest.FromString(text).String()
	}
	ingest("config")
	// Copies need less. A command knows what to copy once all documents have come.
	root := filepath.Join(t.TempDir(), "copy")
	copies := func(name, d string) {
		t.Helper()
		file, _ := run("", "dist-path", "-q", d)
		source := strings.TrimSuffix(file, "/blobs/sha256/"+strings.TrimPrefix(d, "sha256:")+"\n")
		c := exec.Command(filepath.Join(bin, "dist-copy-graph"), "-q", "--dry-run", "--root", root, "--from", `exec "$FETCH" --batch --no-verify "$FROM"`, d)
		c.Env = append(os.Environ(), "FETCH="+filepath.Join(bin, "dist-fetch"), "FROM="+source)
		peak := bounded(t, c, 2*time.Minute)
		t.Logf("copy of %s: status %d, %d MiB", name, c.ProcessState.ExitCode(), peak>>20)
		if status := c.ProcessState.ExitCode(); peak > copyMemory || status != 0 && status != 3 && status != 4 {
			t.Errorf("copy of %s: status %d, %d MiB", name, status, peak>>20)
		}
	}
	var nested []string
	for range 4 {
		text := many(most/2, index, descriptor(manifestType, ""), `]}`)
		nested = append(nested, fmt.Sprintf(`{"mediaType":"%s","digest":"%s","size":%d}`, indexType, ingest(text), len(text)))
	}
	for name, text := range map[string]string{
		"index":       many(1<<20, index, descriptor(manifestType, ""), `]}`),
		"platforms":   many(most, index, descriptor(manifestType, platform), `]}`),
		"objects":     many(1<<20, index, `{"digest":"sha256:%064x"}`, `]}`),
		"manifest":    many(most-2, manifest, descriptor("application/vnd.oci.image.layer.v1.tar", ""), `]}`),
		"annotations": many(1<<16, index+`{"digest":"`+digest.FromString("config").String()+`","size":6,"annotations":{`, `"%x":""`, `}}]}`),
		"commas":      many(1<<20, index+`{"digest":"`+digest.FromString("config").String()+`","size":6,"annotations":{`, `"%x":""`, `}}]}`),
		"foreign":     many(1<<20, `{"mediaType":"application/x","blobs":[`, descriptor("a/b", ""), `]}`),
		"nested":      index + strings.Join(nested, ",") + `]}`,
	} {
		d := ingest(text)
		if _, status := run("", "dist-image", "create", "x:"+name, d); status != 0 && status != 2 {
			t.Errorf("create %s: %d", name, status)
		}
		for _, args := range [][]string{
			{"dist-image", "check"}, {"dist-image", "check", "--all-platforms"}, {"dist-image", "children", "--all-platforms"}, {"dist-image", "layers"},
			{"dist-image", "convert", "--replace"}, {"dist-export", "--sparse"}, {"dist-export"},
		} {
			args = append(args, d)
			if args[1] == "convert" {
				args = append(args, "y:"+name)
			}
			if _, status := run("", args...); status != 0 && status != 2 && status != 3 && status != 4 {
				t.Errorf("%q of %s: %d", args, name, status)
			}
		}
		run("", "dist-image", "sources", d, "registry.example/x")
		copies(name, d)
	}
	run("", "dist-image", "ls")
	run("", "dist-image", "du")
	if _, status := run("", "dist-gc", "--grace", "0"); status != 0 {
		t.Errorf("dist-gc: %d", status)
	}

	layout := [2]string{"oci-layout", `{"imageLayoutVersion":"1.0.0"}`}
	name := `,"annotations":{"org.opencontainers.image.ref.name":"example.org/x:1","a":"b","c":"d"}`
	for _, count := range []int{most, 1 << 20} {
		if _, status := run(tarOf(t, layout, [2]string{"index.json", many(count, `{"manifests":[`, descriptor(manifestType, name), `]}`)}), "dist-import", "--base-name", "x"); status != 2 && status != 4 {
			t.Errorf("import of an index.json of %d: %d", count, status)
		}
	}
	// As many names as an export can write.
	blob := func(text string) [2]string {
		return [2]string{"blobs/sha256/" + digest.FromString(text).Encoded(), text}
	}
	empty := `{"schemaVersion":2,"mediaType":"` + indexType + `","manifests":[]}`
	entry := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"io.containerd.image.name":"example.org/x:%%d","org.opencontainers.image.ref.name":"1"}}`,
		indexType, digest.FromString(empty), len(empty))
	named := many(25_000, `{"manifests":[`, entry, `]}`)
	if out, status := run(tarOf(t, layout, blob(empty), [2]string{"index.json", named}), "dist-import"); status != 0 || strings.Count(out, "\n") != 25_000 {
		t.Errorf("import of many names: %d, %d lines", status, strings.Count(out, "\n"))
	}
	annotations := many(1<<20, `{"manifests":[{"digest":"`+digest.FromString("config").String()+`","size":6,"annotations":{`, `"%x":""`, `}}]}`)
	if _, status := run(tarOf(t, layout, [2]string{"index.json", annotations}), "dist-import", "--name", "x"); status != 2 && status != 4 {
		t.Errorf("import of many annotations: %d", status)
	}
	run = boundedStore(t) // existing names take memory too
	// The archives have the largest allowed number of entries, and of images in manifest.json. The images share a
	// config of 4 MB, which must be read once only.
	files := make([][2]string, 0, 1<<17)
	for i := range cap(files) - 1 {
		files = append(files, [2]string{fmt.Sprintf("%0100x", i), ""})
	}
	run(tarOf(t, files...), "dist-import")
	layer := tarOf(t)
	big := `{"rootfs":{"type":"layers","diff_ids":["` + digest.FromString(layer).String() + `"]},"x":"` + strings.Repeat("x", 4<<20) + `"}`
	for count, want := range map[int]int{25_000: 0, 100_000: 2} {
		images := many(count, `[`, `{"Config":"c.json","Layers":["l.tar"],"RepoTags":["x:%d"]}`, `]`)
		out, status := run(tarOf(t, [2]string{"c.json", big}, [2]string{"l.tar", layer}, [2]string{"manifest.json", images}), "dist-import")
		if lines := strings.Count(out, "\n"); status != want || status == 0 && lines != count {
			t.Errorf("import of %d images: %d, %d lines", count, status, lines)
		}
	}
}
