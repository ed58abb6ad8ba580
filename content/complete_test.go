package content

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// The beginning of a digest is completed to the only blob that has it. A whole digest stays the same.
func TestCompletingADigest(t *testing.T) {
	t.Parallel()
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	blobs := []string{"sha256:abcd" + strings.Repeat("0", 60), "sha256:abcd" + strings.Repeat("1", 60), "sha512:abce" + strings.Repeat("2", 124)}
	for i := range 2 * maxCandidates {
		blobs = append(blobs, "sha256:cafe"+strings.Repeat(string(rune('0'+i)), 60))
	}
	for _, b := range blobs {
		file := filepath.Join(s.Root(), "blobs", strings.Replace(b, ":", "/", 1))
		if err := os.MkdirAll(filepath.Dir(file), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, nil, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	absent := "sha256:" + strings.Repeat("abcd", 16)
	for _, c := range []struct {
		given, want string
		is          func(error) bool
	}{
		{blobs[0], blobs[0], nil},
		{absent, absent, nil},
		{"abcd0", blobs[0], nil},
		{"sha256:abcd1", blobs[1], nil},
		{strings.TrimPrefix(blobs[1], "sha256:"), blobs[1], nil},
		{"abce", blobs[2], nil},
		{"sha512:abce", blobs[2], nil},
		{"sha256:abce", "", errdefs.IsNotFound},
		{"abcd", "", errdefs.IsInvalidArgument},
		{"cafe", "", errdefs.IsInvalidArgument},
		{"abc", "", errdefs.IsInvalidArgument},
		{"ABCD0", "", errdefs.IsInvalidArgument},
		{"md5:abcd", "", errdefs.IsNotImplemented},
		{"../abcd", "", errdefs.IsInvalidArgument},
		{"", "", errdefs.IsInvalidArgument},
	} {
		got, err := s.Complete(context.Background(), c.given)
		if c.is == nil {
			if err != nil || got != digest.Digest(c.want) {
				t.Errorf("%q: %s, %v; want %s", c.given, got, err, c.want)
			}
		} else if !c.is(err) || len(err.Error()) > 100+80*maxCandidates {
			t.Errorf("%q: %s, %v", c.given, got, err)
		}
	}
	if _, err := s.Complete(context.Background(), "abcd"); err == nil || !strings.Contains(err.Error(), blobs[0]+", "+blobs[1]) {
		t.Errorf("the candidates are not named: %v", err)
	}
}
