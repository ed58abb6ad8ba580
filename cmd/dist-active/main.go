// Dist-active lists the ingests of a store, or draws how expected blobs arrive.
package main

import (
	"time"

	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Ref      string        `json:"ref"`
	Offset   int64         `json:"offset"`
	Total    int64         `json:"total,omitempty"`
	Started  time.Time     `json:"startedAt"`
	Updated  time.Time     `json:"updatedAt"`
	State    string        `json:"state"`
	Expected digest.Digest `json:"expected,omitempty"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-active [flags]",
		Short: "list the ingests under way, or draw their progress",
		Args:  cobra.NoArgs,
	}
	root := cli.Root(c.Flags())
	out := cli.NewRecords(c, "REF", "OFFSET", "TOTAL", "STARTED", "UPDATED", "STATE")
	watched := c.Flags().String("watch", "", "draw on standard error how the blobs arrive whose descriptors come on standard input: `-`")
	c.RunE = func(c *cobra.Command, _ []string) error {
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		switch *watched {
		case "":
		case "-":
			return watch(c.Context(), s)
		default:
			return cli.Usagef("--watch %s: only - (standard input) is possible", *watched)
		}
		list, err := s.ListStatuses(c.Context())
		if err != nil {
			return err
		}
		for _, st := range list {
			state := "stale"
			if st.Active {
				state = "active"
			}
			err := out.Write(record{st.Ref, st.Offset, st.Total, st.StartedAt, st.UpdatedAt, state, st.Expected},
				st.Ref, cli.Size(st.Offset), cli.Size(st.Total), st.StartedAt, st.UpdatedAt, cli.State(state))
			if err != nil {
				return err
			}
		}
		return out.Close()
	}
	return c
}
