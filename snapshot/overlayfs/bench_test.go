package overlayfs_test

import (
	"fmt"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/overlayfs"
)

func BenchmarkPrepare(b *testing.B) {
	for _, layers := range []int{1, 20, 100} {
		b.Run(fmt.Sprintf("layers=%d", layers), func(b *testing.B) {
			ctx := b.Context()
			s, err := snapshot.Open(b.TempDir(), overlayfs.Driver{}, snapshot.Options{})
			if err != nil {
				b.Fatal(err)
			}
			parent := ""
			for i := range layers {
				name := fmt.Sprint("layer ", i)
				if _, err := s.Prepare(ctx, "key", parent, nil); err != nil {
					b.Fatal(err)
				}
				if err := s.Commit(ctx, name, "key", snapshot.CommitOptions{}); err != nil {
					b.Fatal(err)
				}
				parent = name
			}
			n := 0
			for b.Loop() {
				n++
				if _, err := s.Prepare(ctx, fmt.Sprint(n), parent, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
