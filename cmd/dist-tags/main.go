// Dist-tags lists the tags of a remote, or the repositories of a registry.
package main

import (
	"iter"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-tags [flags] LOCATOR",
		Short: "list tags, or the repositories of a registry",
		Args:  cobra.ExactArgs(1),
	}
	options := registry.Flags(c)
	records := cli.NewRecords(c, "TAG")
	order := c.Flags().String("sort", "", "sort by `ORDER`, version or name (default: the registry's order)")
	filters := c.Flags().StringArray("filter", nil, "list what `EXPRESSION` selects, such as name~=^7; repeated: what any selects")
	c.RunE = func(c *cobra.Command, args []string) error {
		compare, ok := map[string]func(a, b string) int{"": nil, "name": strings.Compare, "version": compareVersions}[*order]
		if !ok {
			return cli.Usagef("--sort %q is neither version nor name", *order)
		}
		selected, err := filter.Parse(*filters)
		if err != nil {
			return err
		}
		names, key, err := list(c, args[0], options)
		if err != nil {
			return err
		}
		records.Columns(strings.ToUpper(key))
		write := func(name string) error { return records.Write(map[string]string{key: name}, name) }
		var sorted []string
		for name, err := range names {
			if err != nil {
				return err
			}
			if ok, err := selected.Match(object{key, name}); err != nil {
				return err
			} else if !ok {
				continue
			}
			if compare != nil {
				sorted = append(sorted, name)
			} else if err := write(name); err != nil {
				return err
			}
		}
		slices.SortStableFunc(sorted, compare)
		for _, name := range sorted {
			if err := write(name); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}

// list returns the names, and what they name: tags or repositories.
func list(c *cobra.Command, locator string, o *remotes.Options) (names iter.Seq2[string, error], key string, err error) {
	if host, ok := strings.CutSuffix(locator, "/"); ok && strings.Trim(host, ".") != "" && !strings.Contains(host, "/") {
		return remotes.Repositories(c.Context(), host, *o), "repository", nil
	}
	r, err := remotes.Open(locator, *o)
	if err != nil {
		return nil, "", err
	}
	return r.Tags(c.Context()), "tag", nil
}

// object is a tag or repository for a filter.
type object struct{ key, name string }

func (o object) Field(path []string) (string, bool) {
	return o.name, len(path) == 1 && (path[0] == o.key || path[0] == "name")
}
