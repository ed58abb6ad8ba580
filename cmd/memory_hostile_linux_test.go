package cmd_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// hostileMemory is what a command may take for documents that strangers wrote, some of 8 MiB each.
const hostileMemory = 64 << 20

// Documents of 8 MiB whose decoding would take a hundred times as much.
func TestMemoryOfHostileDocuments(t *testing.T) {
	const size = 8<<20 - 1000
	fill := func(begin, piece, end string) string {
		n := (size - len(begin) - len(end)) / len(piece)
		return begin + strings.Repeat(piece, n-1) + strings.TrimRight(piece, ",") + end
	}
	root := filepath.Join(t.TempDir(), "store")
	run := func(stdin string, args ...string) (string, int) {
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
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range [][2]string{{"oci-layout", `{"imageLayoutVersion":"1.0.0"}`}, {name, text}} {
			if name == "manifest.json" && f[0] == "oci-layout" {
				continue
			}
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
		if _, status := run(b.String(), "dist-import"); status != 2 {
			t.Errorf("import of a hostile %s: status %d", name, status)
		}
	}
}
